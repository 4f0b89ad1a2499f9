"""Independent trainings on several processes or machines."""
