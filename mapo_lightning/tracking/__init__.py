"""MLflow: the logger, its queue, artifacts, and the versions a run was made with."""
