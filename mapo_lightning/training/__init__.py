"""Lightning modules and data modules, checkpoints, and what is measured of an agent."""
