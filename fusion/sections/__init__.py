"""The sections of a recipe, one module for each part of the road; fusion/recipe.py puts them together."""
