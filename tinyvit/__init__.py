"""A Vision Transformer from scratch: every forward and backward pass written by hand, on NumPy or CuPy.

    import tinyvit

    data = tinyvit.load_mnist()
    model = tinyvit.train(data.train_images, data.train_labels, epochs=1)
    print(model.evaluate(data.test_images, data.test_labels))

train              train a model on images and labels
VisionTransformer  a model to use: predict, predict_proba, evaluate, save, load
load_pretrained    the trained model that comes with the package
load_mnist         MNIST, which comes with the package, or four idx files of the same form
ViTConfig          the settings of a model
initialise         new parameters: one flat array with named views
loss_and_gradient  the loss of a batch and its gradient: what a training loop of your own needs
gradient_error     is a backward pass the derivative of its forward pass?

To read how it works, begin with tinyvit/reference.py, the whole model in its plain form. `tinyvit.ops` has the same
operations tuned, `tinyvit.model` the model, `tinyvit.optim` Adam, `tinyvit.training` one step and the training loop.
In a shell, `tinyvit --help` lists the commands.
"""

# There is no __all__, so that help(tinyvit) prints the overview above and not every method of every class.
from tinyvit.classifier import VisionTransformer, load_pretrained, train
from tinyvit.data import load_mnist
from tinyvit.gradcheck import directional_error, gradient_error
from tinyvit.model import ViTConfig, initialise, loss_and_gradient, vit_backward, vit_forward
