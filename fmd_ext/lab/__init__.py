"""Everything that measures, compares or explains the method. The library never imports it."""
