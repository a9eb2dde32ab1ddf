"""One forward call: labels to a plan, the plan to rows, the rows through the layers, and the merge."""
