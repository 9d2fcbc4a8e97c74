"""Where things that ship come from; none of it is installed. Run from the repository's root, as modules."""
