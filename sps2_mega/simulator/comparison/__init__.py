"""Systems side by side on one workload: settings, runs, tables, pictures, and the best setting."""
