"""Every parser of what comes from outside, fed with what nobody would write."""
