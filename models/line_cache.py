"""stub"""
import torch
class LineARConfig: ...
class KVCache:
    def __init__(self, layers, slots):
        self.slots=slots; self.k=[None]*layers; self.v=[None]*layers; self.live=0
    def update(self, layer, q, k, v):
        if self.k[layer] is None:
            s=(k.shape[0],k.shape[1],self.slots,k.shape[3]); self.k[layer]=k.new_empty(s); self.v[layer]=k.new_empty(s)
        e=self.live+1
        self.k[layer][:,:,self.live:e]=k; self.v[layer][:,:,self.live:e]=v
        return self.k[layer][:,:,:e], self.v[layer][:,:,:e]
    def advance(self): self.live+=1
def make_cache(config, grid, layers):
    return KVCache(layers, grid[0]*grid[1])
