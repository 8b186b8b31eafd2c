"""The stages, one file each. They know no Ray, no path and no clock."""
