"""`python -m kvmix_cli`: the same as `kvmix`."""

from .main import main

if __name__ == "__main__":
    main()
