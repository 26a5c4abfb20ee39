"""What trains, and how a prediction is made; a script names one recipe.

recipe              what the rest of a run asks of a recipe
full                all of the U-Net, and text encoders where asked
"""
