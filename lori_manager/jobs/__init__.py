"""Independent trainings at once: on this machine's cores or a cluster's, through Ray or Slurm."""
