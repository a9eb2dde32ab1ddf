"""The commands of `fmd-ext` that need the lab; `fmd_ext.cli` finds them by name."""
