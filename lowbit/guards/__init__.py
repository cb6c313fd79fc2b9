"""How strangers' files are read, shown and written over: types, bounds, escapes, links."""
