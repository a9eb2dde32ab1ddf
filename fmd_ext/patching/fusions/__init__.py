"""Speed that is not FMD: parts of a model that run as fewer, larger ops. Exact up to rounding."""
