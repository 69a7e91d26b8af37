// The CPU kernels of one instruction set. setup.py compiles this file once per set, with
// A3FTA_ISA naming it and the compiler flags to match.

#include "backward.h"
#include "bank.h"
#include "forward.h"
#include "geglu.h"
#include "group_norm.h"
#include "layer_norm.h"
#include "quantize.h"

#ifndef A3FTA_ISA
#error "A3FTA_ISA names the table of kernels that this build exports"
#endif

namespace a3fta::cpu {

#define A3FTA_NAME_(isa) #isa
#define A3FTA_NAME(isa) A3FTA_NAME_(isa)

extern const Kernels A3FTA_ISA;
const Kernels A3FTA_ISA = {
    A3FTA_NAME(A3FTA_ISA),
    {Forward<double>::forward, Forward<float>::forward, Forward<BFloat16>::forward,
     Forward<Float16>::forward},
    {Bank<double>::forward, Bank<float>::forward, Bank<BFloat16>::forward, Bank<Float16>::forward},
    {Forward<double>::up, Forward<float>::up, Forward<BFloat16>::up, Forward<Float16>::up},
    {Backward<double>::backward, Backward<float>::backward, Backward<BFloat16>::backward,
     Backward<Float16>::backward},
    {Backward<double>::outer, Backward<float>::outer, Backward<BFloat16>::outer,
     Backward<Float16>::outer},
    {Geglu<double>::forward, Geglu<float>::forward, Geglu<BFloat16>::forward,
     Geglu<Float16>::forward},
    {Geglu<double>::backward, Geglu<float>::backward, Geglu<BFloat16>::backward,
     Geglu<Float16>::backward},
    {Quantize<double>::quantize, Quantize<float>::quantize, Quantize<BFloat16>::quantize,
     Quantize<Float16>::quantize},
    {Quantize<double>::dequantize, Quantize<float>::dequantize, Quantize<BFloat16>::dequantize,
     Quantize<Float16>::dequantize},
    {GroupNorm<double>::forward, GroupNorm<float>::forward, GroupNorm<BFloat16>::forward,
     GroupNorm<Float16>::forward},
    {GroupNorm<double>::backward, GroupNorm<float>::backward, GroupNorm<BFloat16>::backward,
     GroupNorm<Float16>::backward},
    {LayerNorm<double>::forward, LayerNorm<float>::forward, LayerNorm<BFloat16>::forward,
     LayerNorm<Float16>::forward},
    {LayerNorm<double>::backward, LayerNorm<float>::backward, LayerNorm<BFloat16>::backward,
     LayerNorm<Float16>::backward},
};

}  // namespace a3fta::cpu
