"""FlashCore behind the interfaces of other libraries. Nothing here is loaded or registered by itself."""
