"""``python -m retensor``: the command line, where its script is not on the path."""

from retensor.cli import main

if __name__ == "__main__":
    main()
