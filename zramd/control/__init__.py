"""The varlink interface of one device: what it says (interface), who serves it, who asks."""
