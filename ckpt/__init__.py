"""ckpt: save a running container or process tree with CRIU, bring it back, move it between hosts."""

__version__ = "0.1.0"
