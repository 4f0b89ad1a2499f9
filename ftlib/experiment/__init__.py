"""From one run to many: what is better, and is it real?"""
