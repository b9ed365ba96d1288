// One MoE layer in ggml, llama.cpp's tensor library, behind three C functions, so that bench_cpu_kernel.py can time
// it in its own process. Built there against a ggml whose folder the user names; nothing of ggml is in this repository.
//
//   gate, up = mul_mat_id(weights, x, ids); down = mul_mat_id(weights, swiglu(gate, up), ids)
//
// Quantised weights go into the buffer that llama.cpp itself would choose, the repacking one where that takes them.

#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

struct Graph {
    ggml_context* context;
    ggml_cgraph* graph;
    ggml_tensor *x, *ids, *out;
    ggml_gallocr_t memory;
};

struct Layer {
    ggml_backend_t backend;
    ggml_context* context;
    ggml_backend_buffer_t buffer;
    ggml_tensor *gate, *up, *down;
    int64_t hidden;
    bool repacked;
    std::map<std::pair<int64_t, int64_t>, Graph> graphs;
};

ggml_backend_buffer_type_t repacking_buffer(ggml_backend_t backend) {
    ggml_backend_dev_t device = ggml_backend_get_device(backend);
    auto find = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
    ggml_backend_buffer_type_t* types = find ? find(device) : nullptr;
    return types ? *types : nullptr;
}

void fill(ggml_tensor* tensor, const float* values) {
    const int64_t columns = tensor->ne[0], rows = tensor->ne[1] * tensor->ne[2];
    std::vector<char> data(ggml_row_size(tensor->type, columns) * rows);
    ggml_quantize_chunk(tensor->type, values, data.data(), 0, rows, columns, nullptr);
    ggml_backend_tensor_set(tensor, data.data(), 0, data.size());
}

bool allocate(Layer& layer, ggml_type type, int64_t hidden, int64_t inner, int64_t experts,
              ggml_backend_buffer_type_t where) {
    layer.context = ggml_init({16 * ggml_tensor_overhead(), nullptr, true});
    layer.gate = ggml_new_tensor_3d(layer.context, type, hidden, inner, experts);
    layer.up = ggml_new_tensor_3d(layer.context, type, hidden, inner, experts);
    layer.down = ggml_new_tensor_3d(layer.context, type, inner, hidden, experts);
    layer.buffer = ggml_backend_alloc_ctx_tensors_from_buft(layer.context, where);
    return layer.buffer != nullptr;
}

Graph build(Layer& layer, int64_t tokens, int64_t choices) {
    Graph g{};
    g.context = ggml_init({64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true});
    g.x = ggml_new_tensor_3d(g.context, GGML_TYPE_F32, layer.hidden, 1, tokens);
    g.ids = ggml_new_tensor_2d(g.context, GGML_TYPE_I32, choices, tokens);
    ggml_set_input(g.x);
    ggml_set_input(g.ids);
    ggml_tensor* gate = ggml_mul_mat_id(g.context, layer.gate, g.x, g.ids);
    ggml_tensor* up = ggml_mul_mat_id(g.context, layer.up, g.x, g.ids);
    g.out = ggml_mul_mat_id(g.context, layer.down, ggml_swiglu_split(g.context, gate, up), g.ids);
    ggml_set_output(g.out);
    g.graph = ggml_new_graph(g.context);
    ggml_build_forward_expand(g.graph, g.out);
    g.memory = ggml_gallocr_new(ggml_backend_get_default_buffer_type(layer.backend));
    ggml_gallocr_alloc_graph(g.memory, g.graph);
    return g;
}

}  // namespace

// gate, up [experts, inner, hidden], down [experts, hidden, inner] float32; type: 0 bf16, 1 q8_0, 2 q4_K.
extern "C" void* ggml_moe_new(int32_t type, int64_t hidden, int64_t inner, int64_t experts, const float* gate,
                              const float* up, const float* down) {
    const ggml_type types[] = {GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_K};
    auto layer = std::make_unique<Layer>();
    layer->backend = ggml_backend_cpu_init();
    layer->hidden = hidden;
    ggml_backend_buffer_type_t repacking = type ? repacking_buffer(layer->backend) : nullptr;
    if (repacking) {  // which types it takes is decided when a tensor is initialised in it
        layer->repacked = allocate(*layer, types[type], hidden, inner, experts, repacking) && layer->gate->extra;
    }
    if (!layer->repacked) {
        ggml_backend_buffer_type_t plain = ggml_backend_get_default_buffer_type(layer->backend);
        allocate(*layer, types[type], hidden, inner, experts, plain);
    }
    fill(layer->gate, gate);
    fill(layer->up, up);
    fill(layer->down, down);
    return layer.release();
}

extern "C" int32_t ggml_moe_is_repacked(void* handle) { return static_cast<Layer*>(handle)->repacked; }

// x [tokens, hidden]; ids [tokens, choices]; out [tokens, choices, hidden] or null.
extern "C" void ggml_moe_run(void* handle, const float* x, const int32_t* ids, int64_t tokens, int64_t choices,
                             int32_t threads, float* out) {
    Layer& layer = *static_cast<Layer*>(handle);
    auto found = layer.graphs.find({tokens, choices});
    if (found == layer.graphs.end()) found = layer.graphs.emplace(std::make_pair(tokens, choices), build(layer, tokens, choices)).first;
    Graph& g = found->second;
    ggml_backend_cpu_set_n_threads(layer.backend, threads);
    std::memcpy(g.x->data, x, ggml_nbytes(g.x));
    std::memcpy(g.ids->data, ids, ggml_nbytes(g.ids));
    ggml_backend_graph_compute(layer.backend, g.graph);
    if (out) std::memcpy(out, g.out->data, ggml_nbytes(g.out));
}
