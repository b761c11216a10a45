"""The `qkv` command as a script, for torchrun."""

from qkv.cli import main

if __name__ == "__main__":
    main()
