// A program around emulate.h for the sanitizers: reads one launch from a file, runs it, and writes the memory back.
//
// The file: the kernel's name on a line; nine unsigned 32-bit numbers (grid, block, order, count of memories, count of
// arguments); for every memory its size in bytes as 64 bits, and the bytes; for every argument a kind as 32 bits and two
// numbers of 64: kind 0 is a number (its bits; nothing), kind 1 an array (which memory; where in it, in bytes).

#pragma once

#include <fstream>
#include <iostream>

template <class T>
T read_one(std::istream& in) {
    T value;
    in.read(reinterpret_cast<char*>(&value), sizeof value);
    return value;
}

inline int emulate_main(const std::map<std::string, emulated::Kernel>& kernels, const char* path) {
    std::string name;
    std::ifstream in(path, std::ios::binary);
    std::getline(in, name);
    uint32_t numbers[9];
    in.read(reinterpret_cast<char*>(numbers), sizeof numbers);
    std::vector<std::pair<char*, uint64_t>> memories(numbers[7]);
    for (auto& [bytes, size] : memories) {
        size = read_one<uint64_t>(in);
        bytes = static_cast<char*>(malloc(size));  // of just this size: the sanitizer guards its ends
        in.read(bytes, std::streamsize(size));
    }
    std::vector<uint64_t> words(numbers[8]);  // what each argument is: a number or an address
    std::vector<void*> pointers;
    for (uint64_t& word : words) {
        uint32_t is_array = read_one<uint32_t>(in);
        uint64_t first = read_one<uint64_t>(in), second = read_one<uint64_t>(in);
        word = is_array ? reinterpret_cast<uint64_t>(memories.at(first).first + second) : first;
        pointers.push_back(&word);
    }
    dim3 grid{numbers[0], numbers[1], numbers[2]}, block{numbers[3], numbers[4], numbers[5]};
    const char* error = emulated::launch(kernels.at(name), pointers.data(), grid, block, numbers[6]);
    if (error) {
        std::cerr << error << std::endl;
        return 3;
    }
    std::ofstream out(path, std::ios::binary);
    for (auto& [bytes, size] : memories) out.write(bytes, std::streamsize(size));
    return 0;
}
