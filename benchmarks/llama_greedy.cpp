// llama.cpp's tokenizer, greedy decoding and quantiser behind five C functions, so that check_gguf.py can ask them in
// its own process. Built there against a llama.cpp tree that the user names; nothing of llama.cpp is in this repository.
//
// Keys and values are float32 here: llama.cpp's default, float16, would hide what the weights alone change.

#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "llama.h"

namespace {

struct Model {
    llama_model* model;
    int32_t threads;
};

void errors_only(ggml_log_level level, const char* text, void*) {
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

llama_context* new_context(const Model& model, uint32_t tokens) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = tokens;
    params.n_threads = params.n_threads_batch = model.threads;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    return llama_init_from_model(model.model, params);
}

// The largest logit's index; `margin`: by how much it leads the next.
int32_t choose(const float* logits, int32_t count, float* margin) {
    int32_t best = 0;
    float second = -std::numeric_limits<float>::infinity();
    for (int32_t i = 1; i < count; i++) {
        if (logits[i] > logits[best]) {
            second = logits[best];
            best = i;
        } else if (logits[i] > second) {
            second = logits[i];
        }
    }
    *margin = logits[best] - second;
    return best;
}

}  // namespace

// nullptr where llama.cpp cannot load the file; it says why on stderr.
extern "C" void* peer_open(const char* path, int32_t threads) {
    llama_log_set(errors_only, nullptr);
    llama_backend_init();
    llama_model_params params = llama_model_default_params();
    params.use_extra_bufts =
        false;  // repacked weights would go to AMX tiles, which builds by GCC 12 leave unconfigured
    llama_model* model = llama_model_load_from_file(path, params);
    return model ? new Model{model, threads} : nullptr;
}

extern "C" void peer_close(void* handle) {
    Model* model = static_cast<Model*>(handle);
    llama_model_free(model->model);
    delete model;
}

extern "C" const char* peer_template(void* handle) {
    return llama_model_chat_template(static_cast<Model*>(handle)->model, nullptr);
}

// Ids of a text, with the tokens that the file wants around it; their number, or minus the room that is needed.
extern "C" int32_t peer_tokens(void* handle, const char* text, int32_t length, int32_t* ids, int32_t room) {
    const llama_vocab* vocab = llama_model_get_vocab(static_cast<Model*>(handle)->model);
    return llama_tokenize(vocab, text, length, ids, room, true, true);
}

// `count` greedy tokens after the prompt, and each one's margin. 0, or llama_decode's error.
extern "C" int32_t peer_greedy(void* handle, const int32_t* prompt, int32_t length, int32_t count, int32_t* ids,
                               float* margins) {
    const Model& model = *static_cast<Model*>(handle);
    const int32_t vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model.model));
    llama_context* context = new_context(model, static_cast<uint32_t>(length + count));
    if (!context) return -1;
    std::vector<llama_token> given(prompt, prompt + length);
    llama_batch batch = llama_batch_get_one(given.data(), length);
    int32_t error = 0;
    for (int32_t i = 0; i < count && !error; i++) {
        error = llama_decode(context, batch);
        if (error) break;
        ids[i] = choose(llama_get_logits_ith(context, -1), vocabulary, &margins[i]);
        batch = llama_batch_get_one(&ids[i], 1);
    }
    llama_free(context);
    return error;
}

// `kind`: a number of `enum llama_ftype`; 0, float32, dequantises. 0 on success.
extern "C" uint32_t peer_quantize(const char* source, const char* target, int32_t kind) {
    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.ftype = static_cast<llama_ftype>(kind);
    params.allow_requantize = true;
    return llama_model_quantize(source, target, &params);
}
