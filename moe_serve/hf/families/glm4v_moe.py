"""GLM-4.5V and GLM-4.6V: the text model, which is GLM-4.5 where all positions are a text's."""

from dataclasses import replace

from moe_serve.hf.families.glm4_moe import FAMILY as GLM4_MOE

FAMILY = replace(GLM4_MOE, same_as="glm4_moe")
