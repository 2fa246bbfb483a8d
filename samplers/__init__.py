"""The mathematics of sampling: schedules, plans and the loop that runs them."""
