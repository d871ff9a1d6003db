"""Where to look: random directions z with E[z z'] = I, so that E[(grad . z) z] is the gradient."""

from gradcost.directions.coordinates import Coordinates as Coordinates
from gradcost.directions.direction import Directions as Directions
from gradcost.directions.direction import Situated as Situated
from gradcost.directions.direction import combination as combination
from gradcost.directions.direction import independent as independent
from gradcost.directions.gaussian import Gaussian as Gaussian
from gradcost.directions.rademacher import Rademacher as Rademacher
from gradcost.directions.sphere import Sphere as Sphere
