"""The page of live traffic on the guard's port."""
