"""The stages, one file each. They know no Ray, no path and no clock.

Their files import model libraries only where a stage is made: a recipe, which needs their settings, is read at once.
"""
