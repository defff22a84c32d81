// A program around emulate.h for the sanitizers: reads one launch from a file, runs it, and writes the arrays back.
//
// The file: the kernel's name on a line, then eight unsigned 32-bit numbers (grid, block, order, count of arguments),
// and for every argument a kind (0 a number, 1 an array), its size in bytes as 64 bits, and the bytes.

#pragma once

#include <fstream>
#include <iostream>

inline int emulate_main(const std::map<std::string, emulated::Launcher>& kernels, const char* path) {
    std::string name;
    std::ifstream in(path, std::ios::binary);
    std::getline(in, name);
    uint32_t numbers[8];
    in.read(reinterpret_cast<char*>(numbers), sizeof numbers);
    struct Argument {
        uint32_t kind;
        uint64_t size;
        char* bytes;
    };
    std::vector<Argument> given(numbers[7]);
    std::vector<void*> pointers;
    for (Argument& argument : given) {
        in.read(reinterpret_cast<char*>(&argument.kind), 4);
        in.read(reinterpret_cast<char*>(&argument.size), 8);
        argument.bytes = static_cast<char*>(malloc(argument.size));  // of just this size: the sanitizer guards its ends
        in.read(argument.bytes, std::streamsize(argument.size));
        pointers.push_back(argument.kind ? static_cast<void*>(&argument.bytes) : argument.bytes);
    }
    dim3 grid{numbers[0], numbers[1], numbers[2]}, block{numbers[3], numbers[4], numbers[5]};
    auto kernel = kernels.at(name);
    const char* error = emulated::launch([&] { kernel(pointers.data()); }, grid, block, numbers[6]);
    if (error) {
        std::cerr << error << std::endl;
        return 3;
    }
    std::ofstream out(path, std::ios::binary);
    for (Argument& argument : given) {
        if (argument.kind) out.write(argument.bytes, std::streamsize(argument.size));
    }
    return 0;
}
