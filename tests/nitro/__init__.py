"""A pipeline of Nitro stages without their hardware: the device is a process of its own, on a socket."""
