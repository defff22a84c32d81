"""A Vision Transformer from scratch, with every forward and backward pass written by hand, on NumPy or CuPy.

    import tinyvit

    data = tinyvit.load_mnist()
    model = tinyvit.train(data.train_images, data.train_labels, epochs=1)
    print(model.evaluate(data.test_images, data.test_labels))

train              train a model on images and labels
VisionTransformer  predict, evaluate, save and load with a trained model
load_pretrained    load the trained model that comes with the package
load_mnist         load MNIST, which comes with the package, or another data set in the same format
load_dataset       load a data set of another form, such as EMNIST, a CSV file or a folder of pictures
ViTConfig          the settings of a model
initialise         draw new parameters, which are named views of one flat array
loss_and_gradient  compute the loss of a batch and its gradient, for a training loop of your own
vit_forward        compute the logits of a batch
vit_backward       compute the gradient of every parameter
gradient_error     compare a backward pass with central differences, element by element
directional_error  compare a backward pass with central differences along random directions

To read the code, begin with tinyvit/reference.py, which has the whole model in plain form. `tinyvit.ops` has the
tuned operations, `tinyvit.model` the model, `tinyvit.optim` Adam, and `tinyvit.training` the training loop. In a
shell, `tinyvit --help` lists the commands.
"""

# Without __all__, help(tinyvit) prints only the overview above and not every method of every class.
from tinyvit import console  # the first import, because it answers Ctrl-C during the others
from tinyvit.classifier import VisionTransformer, load_pretrained, train
from tinyvit.data import load_dataset, load_mnist
from tinyvit.gradcheck import directional_error, gradient_error
from tinyvit.model import ViTConfig, initialise, loss_and_gradient, vit_backward, vit_forward

__version__ = "0.2.0.dev0"  # setup.cfg reads it from here
