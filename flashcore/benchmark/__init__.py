"""FlashCore held against its target, its peers and its own other configurations."""
