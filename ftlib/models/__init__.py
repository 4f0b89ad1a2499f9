"""From a name to a network: an ordered list of stages plus a head."""
