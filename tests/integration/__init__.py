"""Parts together: exports of real checkpoints, copies of live models, Ray actors, nodes, the command line."""
