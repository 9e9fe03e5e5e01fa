"""Archives that mean harm. Each attack is a function with a name, the class that it stands for, and how it has to end."""
