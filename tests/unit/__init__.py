"""Parts of the package on their own: no Ray, no process group, no other process."""
