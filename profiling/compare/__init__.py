"""`ldmperf compare`: two sets of records, case by case, with what noise explains."""
