"""Write the records of a study, or a plan, as one HTML file that needs no network.

Nothing here imports torch; figures need the extra `report`.
"""
