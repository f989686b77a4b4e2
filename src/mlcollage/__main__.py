"""``python -m mlcollage`` is the command ``mlcollage``."""

from mlcollage.cli import main

if __name__ == "__main__":
    main()
