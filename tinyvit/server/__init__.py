"""The server of the digit page and of its JSON API: socket, guard, application, and the thread that reads digits.

It needs the libraries of the extra `app`. The files of the page are in tinyvit/page/.
"""
