"""Labels to plan, plan to rows, rows through the layers, and the merge."""
