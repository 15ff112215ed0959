"""The command line as `python -m kvmix_cli`."""

from .main import main

if __name__ == "__main__":
    main()
