"""Methods of co-tuning side by side, for studies: one file each, all behind `cotune.federation.comparison.scene`."""
