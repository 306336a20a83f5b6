"""Sources of step times behind one interface (``base``)."""
