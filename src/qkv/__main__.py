"""`python -m qkv` and `torchrun -m qkv` are the `qkv` command."""

from qkv.cli import main

if __name__ == "__main__":
    main()
