"""Search engines that take the place of the index of a library, for more pairs than one machine."""
