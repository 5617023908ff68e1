"""`python -m lori_manager`."""

from lori_manager.cli.app import main

if __name__ == "__main__":
    main()
