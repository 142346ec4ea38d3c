"""Studies: trainings and measurements that take hours, resumable, whose results are stored beside them: ``python -m studies``."""
