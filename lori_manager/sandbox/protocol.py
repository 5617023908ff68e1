"""What parent and child agree on."""

TOKEN_BYTES = 32
FAILED = 3  # exit code: the program raised
UNFIT = 70  # exit code: the guards cannot be had; why is on standard error
NAMESPACES, LANDLOCK, SECCOMP = "namespaces", "landlock", "seccomp"
