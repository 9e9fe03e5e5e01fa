"""A whole host: save its workloads before it goes down, bring them back when it is up again."""
