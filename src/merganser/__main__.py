"""`python -m merganser` is the command line."""

from merganser.cli import main

if __name__ == "__main__":
    main()
